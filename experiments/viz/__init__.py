"""Pictures of what selectors kept."""
