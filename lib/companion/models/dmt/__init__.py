"""DMT: Comprehensive Distillation with Multiple Self-supervised Teachers."""
