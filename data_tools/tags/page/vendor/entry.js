export { hierarchy, partition } from "d3-hierarchy";
export { scaleLinear, scaleLog, scaleBand, scaleSequential } from "d3-scale";
export { interpolateViridis, interpolatePuOr } from "d3-scale-chromatic";
export { zoom, zoomIdentity } from "d3-zoom";
export { select } from "d3-selection";
export { quadtree } from "d3-quadtree";
export { axisBottom, axisLeft } from "d3-axis";
export { bin, max, extent, quantileSorted } from "d3-array";
export { format } from "d3-format";
