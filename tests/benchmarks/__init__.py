"""Fleets that a result can be reproduced on; no part of what is installed."""
