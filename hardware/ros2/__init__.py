"""ROS 2: topics, messages, profiles of arms, nodes. Only this package imports rclpy, and only where something is run.

Start with `contract.py` (the topics) and `profile.py` (an arm).
"""
