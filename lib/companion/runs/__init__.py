"""What a notebook runs live, at pocket and at paper scale: data, models, published settings, one file a paper."""
