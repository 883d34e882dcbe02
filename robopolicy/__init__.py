"""robopolicy: demonstrations to a working arm. Import from the modules: ``from robopolicy.policy import load_policy``."""
