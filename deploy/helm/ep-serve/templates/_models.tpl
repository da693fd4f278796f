{{- /* The models, completed and checked. */ -}}

{{- /* `under` with what `over` says differently, as JSON: lists and scalars are replaced, null
       leaves the default. (mergeOverwrite would ignore 0, false and "".) */ -}}
{{- define "ep-serve.merged" -}}
{{- $merged := deepCopy .under -}}
{{- range $name, $value := .over -}}
{{- $below := index $merged $name -}}
{{- if and (kindIs "map" $value) (kindIs "map" $below) -}}
{{- $value = include "ep-serve.merged" (dict "under" $below "over" $value) | fromJson -}}
{{- end -}}
{{- if not (kindIs "invalid" $value) -}}
{{- $_ := set $merged $name $value -}}
{{- end -}}
{{- end -}}
{{- toJson $merged -}}
{{- end }}

{{- /* All models by name, each with everything from `engine`, as JSON. */ -}}
{{- define "ep-serve.models" -}}
{{- $models := dict -}}
{{- range $name, $own := .Values.models -}}
{{- $model := include "ep-serve.merged" (dict "under" $.Values.engine "over" (default dict $own)) | fromJson -}}
{{- $_ := set $models $name $model -}}
{{- end -}}
{{- include "ep-serve.checkModels" (dict "root" $ "models" $models) -}}
{{- toJson $models -}}
{{- end }}

{{- define "ep-serve.servedName" -}}
{{- default .name .model.servedName -}}
{{- end }}

{{- /* Where the checkpoint is in the container. */ -}}
{{- define "ep-serve.checkpointPath" -}}
{{- with .model.checkpoint -}}
{{- if .embedded -}}
/models/embedded
{{- else if .download.source -}}
/models/{{ .download.sha256 }}
{{- else -}}
{{ .path }}
{{- end -}}
{{- end -}}
{{- end }}

{{- /* Fewest pods that are there at a time. */ -}}
{{- define "ep-serve.fewestReplicas" -}}
{{- ternary .autoscaling.minReplicas .replicas (ne .autoscaling.kind "") -}}
{{- end }}

{{- /* "true" if pods on several nodes can mount the model cache. */ -}}
{{- define "ep-serve.cacheIsShared" -}}
{{- $cache := .modelCache -}}
{{- if or $cache.existingClaim (not $cache.size) (has "ReadWriteMany" $cache.accessModes) (has "ReadOnlyMany" $cache.accessModes) -}}
true
{{- end -}}
{{- end }}

{{- define "ep-serve.checkModels" -}}
{{- if not .models -}}
{{- fail "models: name at least one model; examples are in deploy/helm/examples" -}}
{{- end -}}
{{- $served := dict -}}
{{- range $name, $model := .models -}}
{{- $at := printf "models.%s" $name -}}
{{- $sources := list $model.checkpoint.path $model.checkpoint.embedded $model.checkpoint.download.source | compact -}}
{{- if ne (len $sources) 1 -}}
{{- fail (printf "%s.checkpoint: give exactly one of path, embedded and download.source (got %d)" $at (len $sources)) -}}
{{- end -}}
{{- if and $model.checkpoint.download.source (not $model.checkpoint.download.sha256) -}}
{{- fail (printf "%s.checkpoint.download.sha256: is needed with a source; see \"Model downloads\" in deploy/README.md" $at) -}}
{{- end -}}
{{- $public := include "ep-serve.servedName" (dict "name" $name "model" $model) -}}
{{- with index $served $public -}}
{{- fail (printf "%s.servedName: %s is the name of models.%s already" $at $public .) -}}
{{- end -}}
{{- $_ := set $served $public $name -}}
{{- $scaling := $model.autoscaling -}}
{{- if and $scaling.kind (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling: minReplicas (%d) is greater than maxReplicas (%d)" $at (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- $most := ternary (int $scaling.maxReplicas) (int $model.replicas) (ne $scaling.kind "") -}}
{{- if and (gt $most 1) (not (include "ep-serve.cacheIsShared" $model)) -}}
{{- fail (printf "%s.modelCache.accessModes: %d pods share the claim, so ReadWriteMany is needed (got %s)" $at $most (join ", " $model.modelCache.accessModes)) -}}
{{- end -}}
{{- range $option, $_ := $model.options -}}
{{- if has $option (list "host" "port" "api-key" "served-model-name" "tensor-parallel-size" "shutdown-timeout" "keep-ratio" "sieve" "fps" "max-fps" "max-frames" "min-pixels" "max-pixels" "max-full-tokens" "tower-cache-gib" "media-cache-gib" "model") -}}
{{- fail (printf "%s.options.%s: is set by the chart; use the value made for it (reduction, gpus, servedName, apiKeySecret, drain)" $at $option) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "ep-serve.checkGateway" -}}
{{- $gateway := .Values.gateway -}}
{{- if and (not $gateway.keysSecret) (not $gateway.allowAnonymous) -}}
{{- fail "gateway.keysSecret: name a Secret with API keys, or set gateway.allowAnonymous: true" -}}
{{- end -}}
{{- if and $gateway.keysSecret $gateway.allowAnonymous -}}
{{- fail "gateway.allowAnonymous: contradicts gateway.keysSecret; give only one" -}}
{{- end -}}
{{- if and $gateway.store.persistent (gt (int $gateway.replicas) 1) -}}
{{- fail (printf "gateway.store.persistent: one process owns the store, so replicas must be 1 (got %d)" (int $gateway.replicas)) -}}
{{- end -}}
{{- if and $gateway.store.s3Secret (not (dig "store" "s3" false $gateway.settings)) -}}
{{- fail "gateway.store.s3Secret: name the bucket too, in gateway.settings.store.s3" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs: name at least one Gateway" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.host: give a host name" -}}
{{- end -}}
{{- $keys := list -}}
{{- range include "ep-serve.models" . | fromJson -}}
{{- $keys = append $keys .apiKeySecret -}}
{{- end -}}
{{- if gt (len (uniq $keys)) 1 -}}
{{- fail "engine.apiKeySecret: the gateway sends one key, so all models need the same Secret" -}}
{{- end -}}
{{- end }}
