"""TAGS: from a pool of instructions to a tree-aware, target-aligned blend (docs/tags.md)."""
