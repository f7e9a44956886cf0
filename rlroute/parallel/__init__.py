"""Many processes train one model: experts in shards, batches in shares, tokens by all-to-all."""
