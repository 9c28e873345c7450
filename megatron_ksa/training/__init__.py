"""Glue between the Megatron trainer and the model: batch, loss, schedules, FLOPs."""
