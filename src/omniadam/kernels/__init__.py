"""What a machine is: the rule compiled for it. A kernel knows memory, not libraries."""
