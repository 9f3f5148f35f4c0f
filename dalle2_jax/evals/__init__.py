"""Metrics of generated images: retrieval, CLIP score, Frechet distance, PSNR, seams and cost."""
