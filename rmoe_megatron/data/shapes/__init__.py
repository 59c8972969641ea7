"""The toy shapes set: a small synthetic compositional text-to-image data set with exact ground truth."""
