export { extent, max, quantileSorted } from "d3-array";
export { axisBottom, axisLeft } from "d3-axis";
export { hierarchy, partition } from "d3-hierarchy";
export { quadtree } from "d3-quadtree";
export { scaleLinear, scaleLog } from "d3-scale";
export { interpolatePuOr, interpolateViridis } from "d3-scale-chromatic";
export { select } from "d3-selection";
export { zoom, zoomIdentity } from "d3-zoom";
