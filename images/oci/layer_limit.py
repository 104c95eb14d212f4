"""The maximum number of layers of an image on this node."""

MAX_LAYERS = 500  # lower folders of one overlay: OVL_MAX_STACK of the kernel's fs/overlayfs/params.h, since Linux 4.0
