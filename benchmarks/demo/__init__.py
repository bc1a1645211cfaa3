"""The picture in the README and the images of `fxmerge demo`."""
