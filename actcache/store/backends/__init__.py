"""Where the objects of a store lie: folders, buckets, any store that zarr opens. A new kind subclasses `Backend`."""
