"""ImageNet at 256 pixels, class-conditional: FID, sFID, Inception score, precision and recall as ADM's evaluation has them."""
