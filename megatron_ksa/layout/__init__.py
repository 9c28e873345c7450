"""Where the text and summary rows of a shard are, and the positions they have."""
