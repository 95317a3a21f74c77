"""Which parameters can be trained: where each tuning mode's work is."""

TUNING_MODES = {
    "full": "core_training.tuning.full",
    "freeze": "core_training.tuning.freeze",
    "lora": "core_training.tuning.lora",
    "qlora": "core_training.tuning.qlora",
}
