"""Generated pictures judged: retrieval, CLIP score, Frechet distance, the report."""
