"""Networks, data and recipes of the published tables that fxmerge is measured on."""
