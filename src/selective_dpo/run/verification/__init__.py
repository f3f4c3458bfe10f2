"""What `verify` checks, a module a stage."""
