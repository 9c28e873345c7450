"""What the trainer needs from the machine: CPU as a device, defaults by what is installed."""
