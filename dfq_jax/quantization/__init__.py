"""What is quantized and how: plans, calibration, simulation, integer arithmetic."""
