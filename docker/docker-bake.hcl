# docker buildx bake -f docker/docker-bake.hcl [gateway | engine | engine-cpu | sbom]

variable "REGISTRY" { default = "" }
variable "VERSION" { default = "0.1.0" }
variable "REVISION" { default = "unknown" }
variable "VLLM_TAG" { default = "v0.32.0" }
variable "VLLM_DIGEST" { default = "" }

group "default" { targets = ["gateway", "engine"] }

target "common" {
  context = "."
  args = { VERSION = VERSION, REVISION = REVISION }
  attest = ["type=sbom", "type=provenance,mode=max"]
}

target "gateway" {
  inherits = ["common"]
  dockerfile = "docker/gateway.Dockerfile"
  platforms = ["linux/amd64", "linux/arm64"]
  tags = ["${REGISTRY}ep-serve/gateway:${VERSION}"]
}

target "engine" {
  inherits = ["common"]
  dockerfile = "docker/engine.Dockerfile"
  args = { VLLM_TAG = VLLM_TAG, VLLM_DIGEST = VLLM_DIGEST }
  tags = ["${REGISTRY}ep-serve/engine:${VERSION}"]
}

target "engine-cpu" {
  inherits = ["common"]
  dockerfile = "docker/engine-cpu.Dockerfile"
  tags = ["${REGISTRY}ep-serve/engine-cpu:${VERSION}"]
}

# The bills of materials as files: dist/sbom/<image>/sbom.spdx.json.
group "sbom" { targets = ["sbom-gateway", "sbom-engine"] }

target "sbom-gateway" {
  inherits = ["gateway"]
  platforms = ["linux/amd64"]
  attest = ["type=sbom"]
  output = ["type=local,dest=dist/sbom/gateway"]
}

target "sbom-engine" {
  inherits = ["engine"]
  attest = ["type=sbom"]
  output = ["type=local,dest=dist/sbom/engine"]
}
