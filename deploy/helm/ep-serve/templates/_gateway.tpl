{{- /* The gateway's settings: those of the values, and those that belong to the chart. JSON, which
       is YAML too, because toYaml writes large numbers as 5e+08. */ -}}
{{- define "ep-serve.gatewayConfig" -}}
{{- $gateway := .root.Values.gateway -}}
{{- $upstreams := list -}}
{{- range $name, $_ := .models -}}
{{- $service := include "ep-serve.object" (dict "root" $.root "component" "engine" "model" $name) -}}
{{- $upstreams = append $upstreams (printf "http://%s:8000" $service) -}}
{{- end -}}
{{- $quota := div (mul $gateway.store.sizeGiB 1073741824 3) 4 -}}
{{- $own := dict
  "host" "0.0.0.0"
  "port" 8080
  "upstreams" $upstreams
  "allow_anonymous" $gateway.allowAnonymous
  "metrics" (dict "host" "0.0.0.0" "port" 9090)
  "internal" (dict "host" "0.0.0.0" "port" 8081)
  "store" (dict "path" "/store" "quota_bytes" $quota) -}}
{{- if $gateway.keysSecret -}}
{{- $_ := set $own "keys_file" "/etc/ep-serve-keys/keys.yaml" -}}
{{- end -}}
{{- include "ep-serve.merged" (dict "under" $gateway.settings "over" $own) | fromJson | toPrettyJson -}}
{{- end }}

{{- /* The largest body that clients may send, as nginx writes sizes: an upload, or a request with its
       inlined media. In MiB, or in GiB where that would take more than the four digits that a
       ClientSettingsPolicy may have. */ -}}
{{- define "ep-serve.bodySize" -}}
{{- $settings := .Values.gateway.settings -}}
{{- $inlined := dig "request" "max_body_bytes" 0 $settings -}}
{{- $mib := add1 (div (max (int64 $settings.media.max_bytes) (int64 $inlined)) 1048576) -}}
{{- if gt $mib 9999 -}}
{{- printf "%dg" (add1 (div $mib 1024)) -}}
{{- else -}}
{{- printf "%dm" $mib -}}
{{- end -}}
{{- end }}
