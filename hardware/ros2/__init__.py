"""ROS 2: topics, messages, profiles of arms, nodes. Nothing else in the project imports rclpy, and importing this does not either."""
