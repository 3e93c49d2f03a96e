"""What a run needs and where its actors go: arithmetic on node tables. Only `ray_placement` talks to Ray."""
