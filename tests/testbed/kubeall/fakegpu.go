package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

// fakePlugin is a device plugin that offers imaginary GPUs: a container that is given one
// sees NVIDIA_VISIBLE_DEVICES and no device.
type fakePlugin struct {
	v1beta1.UnimplementedDevicePluginServer
	count int
}

func (p *fakePlugin) GetDevicePluginOptions(context.Context, *v1beta1.Empty) (*v1beta1.DevicePluginOptions, error) {
	return &v1beta1.DevicePluginOptions{}, nil
}

func (p *fakePlugin) ListAndWatch(_ *v1beta1.Empty, stream v1beta1.DevicePlugin_ListAndWatchServer) error {
	devices := make([]*v1beta1.Device, p.count)
	for i := range devices {
		devices[i] = &v1beta1.Device{ID: fmt.Sprintf("GPU-fake-%d", i), Health: v1beta1.Healthy}
	}
	if err := stream.Send(&v1beta1.ListAndWatchResponse{Devices: devices}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (p *fakePlugin) Allocate(_ context.Context, request *v1beta1.AllocateRequest) (*v1beta1.AllocateResponse, error) {
	response := &v1beta1.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		response.ContainerResponses = append(response.ContainerResponses, &v1beta1.ContainerAllocateResponse{
			Envs: map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")},
		})
	}
	return response, nil
}

// fakeGPU runs `kubeall fake-gpu`. The kubelet empties the plugin folder when it starts, so the
// plugin serves until its socket is gone and then starts over.
func fakeGPU() {
	resource := flag.String("resource", "nvidia.com/gpu", "resource name")
	count := flag.Int("count", 1, "how many devices")
	folder := flag.String("dir", "/var/lib/kubelet/device-plugins", "the kubelet's device plugin folder")
	flag.Parse()
	for {
		if err := serveOnce(*folder, *resource, *count); err != nil {
			log.Print(err)
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// serveOnce listens, registers with the kubelet and returns when its socket has been removed.
func serveOnce(folder, resource string, count int) error {
	socket := filepath.Join(folder, "fake-gpu.sock")
	if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	v1beta1.RegisterDevicePluginServer(server, &fakePlugin{count: count})
	go func() {
		if err := server.Serve(listener); err != nil {
			log.Print(err)
		}
	}()
	defer server.Stop()
	for err = register(folder, resource); err != nil; err = register(folder, resource) {
		log.Printf("register: %v", err)
		time.Sleep(500 * time.Millisecond)
		if _, err := os.Stat(socket); err != nil {
			return nil
		}
	}
	log.Printf("registered %d of %s", count, resource)
	for {
		if _, err := os.Stat(socket); err != nil {
			return nil
		}
		time.Sleep(500 * time.Millisecond)
	}
}

func register(folder, resource string) error {
	connection, err := grpc.NewClient("unix://"+filepath.Join(folder, "kubelet.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err = v1beta1.NewRegistrationClient(connection).Register(ctx, &v1beta1.RegisterRequest{
		Version: v1beta1.Version, Endpoint: "fake-gpu.sock", ResourceName: resource, Options: &v1beta1.DevicePluginOptions{},
	})
	return err
}
