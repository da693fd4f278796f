{{- /* What all pods have in common. */ -}}

{{- define "ep-serve.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "ep-serve.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* The head of a pod's spec: dict "root" $. Service links are off because vLLM would read the
       variable VLLM_PORT that a Service named vllm brings. */ -}}
{{- define "ep-serve.podBase" -}}
serviceAccountName: {{ include "ep-serve.fullname" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "ep-serve.podSecurity" .root | nindent 2 }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* Where pods go: dict "root" $ "values" (engine or gateway) "selector" dict for labels. */ -}}
{{- define "ep-serve.scheduling" -}}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .values.topologySpread }}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels:
        {{- include "ep-serve.selector" $.selector | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* An HTTP probe: dict "path" "port" and what differs from Kubernetes' defaults. */ -}}
{{- define "ep-serve.probe" -}}
httpGet: {path: {{ .path }}, port: {{ .port }}}
periodSeconds: {{ .period }}
timeoutSeconds: {{ .timeout }}
failureThreshold: {{ .failures }}
{{- end }}

{{- /* A PodDisruptionBudget, where there is more than one pod: dict of a selector and "replicas". */ -}}
{{- define "ep-serve.disruptionBudget" -}}
{{- if gt (int .replicas) 1 }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "ep-serve.metadata" . | nindent 2 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "ep-serve.selector" . | nindent 6 }}
{{- end }}
{{- end }}

{{- /* A claim: dict of a selector, "keep", "size", "storageClass", "accessModes". */ -}}
{{- define "ep-serve.claim" }}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  {{- include "ep-serve.metadata" . | nindent 2 }}
  {{- if .keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
spec:
  accessModes: {{ toJson .accessModes }}
  {{- with .storageClass }}
  storageClassName: {{ . }}
  {{- end }}
  resources: {requests: {storage: {{ .size }}}}
{{- end }}
