"""cgroups as files: an emulated hierarchy with encryption IDs, misc resources and bus locks."""
