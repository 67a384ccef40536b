"""Training: SFT and DPO with TRL and PEFT, merging, model cards. Doors: `train_sft`, `train_dpo`, `merge`."""
