{{- /* The engine's container. */ -}}

{{- /* Arguments of `ep-serve`: dict "name" "model". toJson keeps large numbers out of 1e+06 form. */ -}}
{{- define "ep-serve.engineArgs" -}}
{{- $model := .model -}}
- serve
- {{ include "ep-serve.checkpointPath" . }}
- --host=0.0.0.0
- --port=8000
- --served-model-name={{ include "ep-serve.servedName" . }}
- --shutdown-timeout={{ $model.drain.shutdownSeconds }}
{{- if gt (int $model.gpus) 1 }}
- --tensor-parallel-size={{ $model.gpus }}
{{- end }}
{{- range $name, $value := $model.reduction }}
{{- if not (kindIs "invalid" $value) }}
- --{{ kebabcase $name }}={{ $value | toJson | trimAll "\"" }}
{{- end }}
{{- end }}
{{- range $name, $value := $model.options }}
{{- if kindIs "bool" $value }}
- --{{ ternary "" "no-" $value }}{{ $name }}
{{- else }}
- {{ printf "--%s=%s" $name (kindIs "string" $value | ternary $value (toJson $value)) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The root is read-only, so everything that is written goes to /scratch and /tmp. */ -}}
{{- define "ep-serve.engineEnv" -}}
- {name: HOME, value: /scratch}
- {name: USER, value: ep-serve}
- {name: XDG_CACHE_HOME, value: /scratch/cache}
- {name: HF_HOME, value: /scratch/huggingface}
- {name: VLLM_CACHE_ROOT, value: /scratch/vllm}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /scratch/torchinductor}
- {name: TRITON_CACHE_DIR, value: /scratch/triton}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
- {name: VLLM_MEDIA_URL_ALLOW_REDIRECTS, value: "0"}
- name: VLLM_HOST_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- with .apiKeySecret }}
- name: VLLM_API_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: api-key}}
{{- end }}
{{- with .env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* With GPUs added to what `resources` says. */ -}}
{{- define "ep-serve.engineResources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .gpus -}}
{{- $gpus := dict .gpuResource .gpus -}}
{{- $_ := set $resources "requests" (merge (default dict $resources.requests) $gpus) -}}
{{- $_ := set $resources "limits" (merge (default dict $resources.limits) $gpus) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{- /* Brings the checkpoint to /models before the engine starts; nothing for one that is there. */ -}}
{{- define "ep-serve.checkpointStep" -}}
{{- $checkpoint := .model.checkpoint -}}
{{- if or $checkpoint.embedded $checkpoint.download.source }}
- name: checkpoint
  image: {{ include "ep-serve.image" (dict "root" .root "name" "engine") }}
  imagePullPolicy: {{ .root.Values.images.engine.pullPolicy }}
  {{- if $checkpoint.embedded }}
  # Once: the volume may outlive the container, and the folder is there whole or not at all.
  command: [sh, -c, "test -d /models/embedded || ep-serve checkpoint embedded --to=/models/embedded"]
  {{- else }}
  command: [python3, /etc/ep-serve/fetch_checkpoint.py]
  args:
    - {{ $checkpoint.download.source | quote }}
    - {{ include "ep-serve.checkpointPath" . }}
    - --sha256={{ $checkpoint.download.sha256 }}
  {{- end }}
  env:
    - {name: HOME, value: /scratch}
    - {name: USER, value: ep-serve}
    {{- with $checkpoint.download.tokenSecret }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
    {{- end }}
  resources:
    {{- toYaml .model.resources | nindent 4 }}
  securityContext:
    {{- include "ep-serve.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: scratch, mountPath: /scratch}
    - {name: tmp, mountPath: /tmp}
    {{- if $checkpoint.download.source }}
    - {name: scripts, mountPath: /etc/ep-serve, readOnly: true}
    {{- end }}
{{- end }}
{{- end }}

{{- /* Where /models comes from: dict "root" "name" "model". */ -}}
{{- define "ep-serve.modelsVolume" -}}
{{- $cache := .model.modelCache -}}
- name: models
  {{- if $cache.existingClaim }}
  persistentVolumeClaim: {claimName: {{ $cache.existingClaim }}}
  {{- else if $cache.size }}
  persistentVolumeClaim:
    claimName: {{ include "ep-serve.object" (dict "root" .root "component" "models" "model" .name) }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}

{{- /* New pods beside the old ones only where both can mount the models. */ -}}
{{- define "ep-serve.engineStrategy" -}}
{{- if not (include "ep-serve.cacheIsShared" .) -}}
type: Recreate
{{- else -}}
type: RollingUpdate
rollingUpdate:
  maxSurge: {{ .maxSurge }}
  maxUnavailable: {{ ternary 0 1 (gt (int .maxSurge) 0) }}
{{- end -}}
{{- end }}
