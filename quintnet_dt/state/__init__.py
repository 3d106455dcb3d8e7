"""A model's state, saved, loaded and started: checkpoints, safetensors files, models on
the meta device."""
