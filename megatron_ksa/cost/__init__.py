"""What training costs: memory, floating-point operations, bytes on the wire, and the layouts of a cluster."""
