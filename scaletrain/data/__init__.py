"""From raw text to tensors: sources, cleaning, tokenising, indexed shards, the plan that orders them, and the loader."""
