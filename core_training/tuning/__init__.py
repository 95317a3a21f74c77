"""Which parameters are trained. A tuning mode is one file here and one line in this table."""

TUNING_MODES = {
    "full": "core_training.tuning.full",
    "lora": "core_training.tuning.lora",
}
