"""Where the objects of a store lie: folders, buckets, anything that zarr opens."""
