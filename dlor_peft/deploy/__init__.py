"""From adapter to deployment: what is on disk is read, looked at, and written in other forms; no model is trained."""

from ..registration import register

# the command line imports this before anything else of the package
register()
