"""The child: what runs in a zygote and in its forks. The caller never imports this package."""
