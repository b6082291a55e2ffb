"""Launch settings by kernel family, each with its reason."""
