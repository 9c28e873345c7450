"""Files that go with an exported KSA or HARPE model; they import torch and transformers only."""
