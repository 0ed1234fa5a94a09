"""The model library: windows, anchor, network, calibration, bundle and detector."""
