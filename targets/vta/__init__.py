"""The VTA back end: configuration, instruction set, program builder, simulator, lowering, export."""
