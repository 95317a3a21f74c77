"""What a model can be trained for. A stage is one file here and one line in this table."""

STAGES = {
    "pretrain": "core_training.stages.pretrain",
    "sft": "core_training.stages.sft",
}
