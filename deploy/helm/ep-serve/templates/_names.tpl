{{- /* Names, labels and images. */ -}}

{{- define "ep-serve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 30 | trimSuffix "-" -}}
{{- end }}

{{- define "ep-serve.fullname" -}}
{{- $name := include "ep-serve.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 30 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- /* What selects pods: dict "root" $ "component" "engine" ["model" name]. Never changes. */ -}}
{{- define "ep-serve.selector" -}}
app.kubernetes.io/name: {{ include "ep-serve.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .model }}
ep-serve/model: {{ . }}
{{- end }}
{{- end }}

{{- define "ep-serve.labels" -}}
{{ include "ep-serve.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Name and labels of an object: dict "root" $ "component" ... ["model" ...] ["suffix" ...]. */ -}}
{{- define "ep-serve.metadata" -}}
name: {{ include "ep-serve.object" . }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "ep-serve.labels" . | nindent 2 }}
{{- end }}

{{- define "ep-serve.object" -}}
{{- $parts := list (include "ep-serve.fullname" .root) .component .model .suffix | compact -}}
{{- join "-" $parts -}}
{{- end }}

{{- define "ep-serve.image" -}}
{{- $image := index .root.Values.images .name -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end }}
