"""The user's data: batches in memory, readers, superbatches and reading ahead."""
