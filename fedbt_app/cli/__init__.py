"""The `fedbt` command."""
