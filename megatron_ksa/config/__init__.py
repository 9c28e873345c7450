"""Plain dataclasses for the KSA and HARPE settings: parsed and validated once, no torch."""
