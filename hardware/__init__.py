"""Robots and devices: what stands between the library and a world. `ros2` is the only place that imports rclpy."""
