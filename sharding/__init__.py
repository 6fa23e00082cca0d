"""How arrays lie on devices: mesh, axis rules, placement, processes. Knows names of axes, not what a layer means."""
