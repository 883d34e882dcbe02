"""Fine-tuning by reinforcement: one on-policy core, and a small file for what each method does differently."""
