"""The two ways to run ranks: in this process, or as Ray actors."""
