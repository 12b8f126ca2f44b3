"""What NYUv2 and CityScapes share: files, augmentation, networks, losses, metrics and figures."""
